# The server on 0.0.0.0:8080, as a user without rights. What it keeps is in /app/data: give that a volume.
#
#   docker build -t feishu-bot .
#   docker run --rm -it -v feishu-bot:/app/data feishu-bot user add --admin NAME
#   docker run -d -p 127.0.0.1:8080:8080 -v feishu-bot:/app/data -v ./config.yaml:/app/config.yaml:ro feishu-bot

FROM python:3.12-slim AS packages
WORKDIR /app
COPY requirements.lock ./
RUN python -m venv .venv
RUN .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock

FROM python:3.12-slim
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --user-group --uid 10001 --no-create-home --home-dir /app bot && install -d -o bot -g bot /app/data
COPY --from=packages /app/.venv .venv
COPY bot.py config.yaml LICENSE ./
COPY plugins plugins
COPY feishu_bot feishu_bot
RUN python -m compileall -q feishu_bot
USER bot
VOLUME /app/data
EXPOSE 8080
# http.client knows no proxy; the server says 200 as long as it lives, also while its database is away
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "bot.py"]
CMD ["run", "--host", "0.0.0.0", "--port", "8080"]
