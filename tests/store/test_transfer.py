from __future__ import annotations

import csv
import io
import json
import stat
import tracemalloc
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, make_url, select, text, update

from feishu_bot.errors import ConversationNotFound, InvalidImport
from feishu_bot.store import cleanup, conversations, exports, search, threads, transfer
from feishu_bot.store.formats import CsvWriter, from_cell, read_file, to_cell
from feishu_bot.store.schema import conversations as conversation_table
from feishu_bot.store.schema import messages as message_table
from feishu_bot.store.transactions import Transactions
from feishu_bot.store.values import new_message

NOON = datetime(2025, 6, 18, 12, tzinfo=UTC)
KINDS = ("json", "jsonl", "csv")
about_files = pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)  # the database has no say in it


class Shelf:
    """A database to export from and import into."""

    def __init__(self, url):
        self.database = Transactions(url, clock=lambda: NOON)

    def make(self, user_key="web:private:ann", *said, **columns):
        def work(tx):
            row = conversations.get_or_create(tx, user_key, user_key.partition(":")[0][:50])
            roles = ("user", "assistant")
            new = [new_message(roles[n % 2], content, n) for n, content in enumerate(said)]
            conversations.append(tx, row["id"], new)
            if columns:
                where = conversation_table.c.id == row["id"]
                tx.connection.execute(update(conversation_table).where(where).values(columns))
            return row["id"]

        return self.database.write(work)

    def export(self, conversation_id):
        return self.database.read(lambda tx: transfer.export_conversation(tx.connection, conversation_id))

    def take(self, data, **more):
        return self.database.write(
            lambda tx: transfer.import_conversation(tx.connection, tx.kind, data, **more)
        )

    def remove(self, conversation_id):
        self.database.write(partial(conversations.hide, conversation_id=conversation_id))

    def everything(self):
        rows = select(conversation_table.c.id).where(conversation_table.c.hidden_at.is_(None))
        ids = self.database.read(lambda tx: list(tx.connection.execute(rows.order_by("id")).scalars()))
        return [without_ids(self.export(i)) for i in ids]

    def find(self, query):
        return self.database.read(
            lambda tx: search.search_messages(tx.connection, tx.kind, query, limit=5000)
        )


@pytest.fixture
def shelf(db_url):
    shelf = Shelf(db_url)
    yield shelf
    shelf.database.close()


@pytest.fixture
def other(db_url, databases):
    with databases.database(make_url(db_url).drivername) as url:
        shelf = Shelf(url)
        yield shelf
        shelf.database.close()


def without_ids(data):
    """Return an export without what each database numbers for itself."""
    head = {name: value for name, value in data["conversation"].items() if name != "id"}
    said = [{name: value for name, value in m.items() if name != "id"} for m in data["messages"]]
    return {"conversation": head, "messages": said}


def conversation(user_key="web:private:ann", *said, **head):
    """Return what a program of the seed's kind has exported."""
    return {
        "conversation": {"user_key": user_key, "platform": "web", **head},
        "messages": [{"role": "user", "content": content} for content in said],
    }


# -------------------------------------------------------------------------------------------- one conversation


def test_an_export_has_the_structure_that_is_documented(shelf):
    conversation_id = shelf.make("web:private:ann", "hello", "hi")
    assert shelf.export(conversation_id) == {
        "conversation": {
            "id": conversation_id,
            "public_id": shelf.export(conversation_id)["conversation"]["public_id"],
            "user_key": "web:private:ann",
            "platform": "web",
            "chat_id": None,
            "created_at": "2025-06-18T12:00:00Z",
            "last_activity": "2025-06-18T12:00:00Z",
            "summary": None,
            "total_tokens": 1,
            "message_count": 2,
            "active_persona_id": None,
            "tenant_id": "default",
            "user_id": None,
            "agent": None,
            "title": "hello",
            "traits": {},
            "scope_key": "user:web:private:ann",
            "forked_from": None,
            "forked_at": None,
        },
        "messages": [
            {
                "id": message_id,
                "role": role,
                "content": content,
                "timestamp": "2025-06-18T12:00:00Z",
                "tokens": tokens,
                "metadata": {},
                "sender_id": sender,
                "source_id": None,
                "save_key": None,
                "edited_at": None,
                "recalled_at": None,
            }
            for message_id, role, content, tokens, sender in (
                (1, "user", "hello", 0, "web:private:ann"),
                (2, "assistant", "hi", 1, None),
            )
        ],
    }


def test_an_unknown_conversation_cannot_be_exported(shelf):
    with pytest.raises(ConversationNotFound):
        shelf.export(7)
    with pytest.raises(ConversationNotFound):
        list(transfer.iter_messages(shelf.database, 7))


def test_messages_are_read_in_pages_in_their_order(shelf):
    many = exports.PAGE + 7
    conversation_id = shelf.make("web:private:ann", *[str(n) for n in range(many)])
    found = [m["content"] for m in transfer.iter_messages(shelf.database, conversation_id)]
    assert found == [str(n) for n in range(many)]


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
TEXTS = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
    | st.sampled_from(
        ["=1+1", "@x", "'", "''", "-", "\t", "\r\n", "\r", "\n", " ", "", '"', ",;", "\u2028", "\ufeff"]
    )
    | st.text("=+-@'\"\r\n\t,; a", max_size=12)
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=3)
INSTANTS = st.datetimes(datetime(1000, 1, 2), datetime(9999, 12, 30)).map(lambda at: at.isoformat() + "Z")  # noqa: DTZ001  # the Z says it
NAMES = st.none() | TEXTS.map(lambda text: text[:30])
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]),
        "content": TEXTS,
        "timestamp": INSTANTS,
        "tokens": st.integers(0, 2**40),
        "metadata": OBJECTS,
        "sender_id": NAMES,
        "source_id": NAMES,
        "edited_at": st.none() | INSTANTS,
        "recalled_at": st.none() | INSTANTS,
    }
)
HEADS = st.fixed_dictionaries(
    {
        "user_key": KEYS,
        "platform": KEYS,
        "chat_id": NAMES,
        "created_at": INSTANTS,
        "last_activity": INSTANTS,
        "summary": st.none() | TEXTS,
        "active_persona_id": NAMES,
        "tenant_id": KEYS,
        "user_id": NAMES,
        "agent": NAMES,
        "title": NAMES,
        "traits": OBJECTS,
    }
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(head=HEADS, said=st.lists(MESSAGES, max_size=4), name=st.uuids())
def test_what_is_exported_imported_and_exported_again_is_the_same_whatever_was_said(
    shelf, tmp_path, head, said, name
):
    data = {"conversation": head | {"public_id": str(name)}, "messages": said}
    first = shelf.export(shelf.take(data))
    assert [m["content"] for m in first["messages"]] == [m["content"] for m in said]
    for kind in KINDS:
        shelf.remove(first["conversation"]["id"])
        file = tmp_path / f"one.{kind}"
        with exports.atomic_file(file) as out:
            writer = exports.make_writer(out, kind)
            writer.begin(first["conversation"])
            for message in first["messages"]:
                writer.message(message)
            writer.end()
            writer.close()
        assert transfer.import_all(shelf.database, file) == transfer.Imported(1, len(said), 0)
        known = select(conversation_table.c.id).where(conversation_table.c.public_id == str(name))
        new_id = shelf.database.read(lambda tx, k=known: tx.connection.execute(k).scalar_one())
        again = shelf.export(new_id)
        assert without_ids(again) == without_ids(first)
        first = again
    shelf.remove(first["conversation"]["id"])


def test_an_import_counts_and_does_not_believe_the_totals_in_the_data(shelf):
    data = conversation("web:private:ann", "a", "b", total_tokens=999, message_count=77)
    data["messages"][1]["tokens"] = 5
    head = shelf.export(shelf.take(data))["conversation"]
    assert (head["message_count"], head["total_tokens"]) == (2, 5)


def test_an_imported_conversation_goes_on_as_if_it_had_been_held_here(shelf):
    conversation_id = shelf.take(conversation("web:private:ann", "a", "b"))
    assert shelf.make("web:private:ann", "c") == conversation_id
    found = shelf.export(conversation_id)
    assert [m["content"] for m in found["messages"]] == ["a", "b", "c"]
    assert found["conversation"]["message_count"] == 3
    assert [hit["content"] for hit in shelf.find("b")] == ["b"]


def test_without_a_public_id_a_known_user_key_is_left_as_it_is(shelf):
    conversation_id = shelf.make("web:private:ann", "hello")
    before = shelf.export(conversation_id)
    assert shelf.take(conversation("web:private:ann", "other")) == conversation_id
    assert shelf.export(conversation_id) == before


def test_the_same_user_key_in_another_tenant_is_another_conversation(shelf):
    own = shelf.take(conversation("web:private:ann", "a"))
    acme = shelf.take(conversation("web:private:ann", "b"), tenant_id="acme")
    assert own != acme
    assert shelf.export(acme)["conversation"]["tenant_id"] == "acme"


def test_a_tenants_import_neither_finds_nor_changes_what_is_anothers(shelf):
    conversation_id = shelf.make("web:private:ann", "secret")
    data = shelf.export(conversation_id)
    copy = shelf.take(data | {"messages": []}, tenant_id="acme")
    assert copy != conversation_id
    assert shelf.take(data, tenant_id="acme") == copy
    assert shelf.export(conversation_id) == data


def test_a_conversation_that_was_deleted_can_be_imported_again(shelf):
    conversation_id = shelf.make("web:private:ann", "hello")
    data = shelf.export(conversation_id)
    shelf.remove(conversation_id)
    again = shelf.take(data)
    assert without_ids(shelf.export(again)) == without_ids(data)
    assert shelf.make("web:private:ann") == again


def test_an_import_does_not_take_the_place_of_the_current_conversation(shelf):
    old = shelf.export(shelf.make("web:private:ann", "old"))
    shelf.remove(old["conversation"]["id"])
    current = shelf.make("web:private:ann", "new")
    archived = shelf.take(old)
    assert shelf.export(archived)["conversation"]["scope_key"] is None
    assert shelf.make("web:private:ann") == current


def test_a_fork_finds_its_origin_again(shelf, other, tmp_path):
    origin = shelf.make("web:private:ann", "a", "b", "c")
    second = shelf.export(origin)["messages"][1]["id"]
    shelf.database.write(lambda tx: threads.fork(tx, origin, second))
    shelf.make("web:private:bob", "x")
    transfer.export_all(shelf.database, tmp_path / "all.json")
    other.make("web:private:zoe", *["shift the numbers"] * 3)
    transfer.import_all(other.database, tmp_path / "all.json")
    assert other.everything()[1:] == shelf.everything()
    fork = other.everything()[2]["conversation"]
    assert fork["forked_from"] == other.everything()[1]["conversation"]["public_id"]
    assert fork["forked_at"] == 2


# ------------------------------------------------------------------------------------------------------- files


def some_conversations(shelf):
    shelf.make("feishu:group:ou_1", "hello", "=cmd()")
    shelf.make("web:private:ann")
    shelf.make("qq:private:1:2", "天气", "好\r\n的", "'")


@pytest.mark.parametrize("kind", KINDS)
def test_all_conversations_go_through_one_file(shelf, other, tmp_path, kind):
    some_conversations(shelf)
    file = tmp_path / f"all.{kind}"
    assert transfer.export_all(shelf.database, file, kind) == transfer.Exported(3, 5, 1)
    assert transfer.import_all(other.database, file) == transfer.Imported(3, 5, 0)
    assert other.everything() == shelf.everything()
    assert transfer.import_all(other.database, file) == transfer.Imported(0, 0, 3)
    assert other.everything() == shelf.everything()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gets_a_file_for_each_conversation_and_can_be_imported(shelf, other, tmp_path, kind):
    some_conversations(shelf)
    folder = tmp_path / "out"
    assert transfer.export_all(shelf.database, f"{folder}/", kind) == transfer.Exported(3, 5, 3)
    assert sorted(f.name for f in folder.iterdir()) == [
        f"feishu_group_ou_1_1.{kind}",
        f"qq_private_1_2_3.{kind}",
        f"web_private_ann_2.{kind}",
    ]
    assert transfer.import_all(other.database, folder) == transfer.Imported(3, 5, 0)
    by_key = sorted(other.everything(), key=lambda e: e["conversation"]["user_key"])
    assert by_key == sorted(shelf.everything(), key=lambda e: e["conversation"]["user_key"])


def test_one_conversation_in_a_file_of_its_own_is_the_documented_object(shelf, tmp_path):
    conversation_id = shelf.make("web:private:ann", "hello")
    transfer.export_all(shelf.database, tmp_path)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == shelf.export(conversation_id)


@about_files
def test_an_empty_database_gives_an_empty_file_that_can_be_imported(shelf, tmp_path):
    for kind in KINDS:
        transfer.export_all(shelf.database, tmp_path / f"none.{kind}", kind)
        assert transfer.import_all(shelf.database, tmp_path / f"none.{kind}") == transfer.Imported(0, 0, 0)
    assert json.loads((tmp_path / "none.json").read_text()) == []


@about_files
def test_names_of_files_stay_inside_their_folder(shelf, tmp_path):
    for key in ("../../etc/passwd", "..", ".hidden", "a/b\\c", "x" * 255, "天气:群", "con\n"):
        shelf.make(key, "x")
    transfer.export_all(shelf.database, f"{tmp_path}/out/")
    transfer.export_all(shelf.database, f"{tmp_path}/out/")
    names = [f.name for f in (tmp_path / "out").iterdir()]
    assert len(names) == 7
    assert not any(name.startswith(".") or len(name) > 90 for name in names)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@about_files
def test_an_export_is_for_its_owner_only_and_leaves_nothing_when_it_fails(shelf, tmp_path):
    shelf.make("web:private:ann", "hello")
    file = tmp_path / "all.json"
    transfer.export_all(shelf.database, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    with pytest.raises(ZeroDivisionError):
        transfer.export_all(shelf.database, file, progress=lambda _done, _total: 1 // 0)
    assert [f.name for f in tmp_path.iterdir()] == ["all.json"]
    assert file.read_bytes() == before


def test_a_persons_export_has_his_conversations_and_what_he_said_in_those_of_others(shelf, tmp_path):
    shelf.make("qq:private:bob", "in private", "answered")
    shelf.make("qq:group:bob", "in a group")
    shelf.make("qq:private:ann", "of somebody else")
    shared = shelf.make("qq:chat:g1", "by bob", "answer", "by ann", summary="Bob and Ann")
    for content, sender in (("by bob", "qq:group:bob"), ("by ann", "qq:group:ann")):
        where = message_table.c.content == content
        shelf.database.write(
            lambda tx, w=where, s=sender: tx.connection.execute(
                update(message_table).where(w).values(sender_id=s)
            )
        )
    for name in ("qq:bob", "qq:private:bob"):
        file = tmp_path / "bob.json"
        transfer.export_all(shelf.database, file, user=name)
        found = json.loads(file.read_text())
        assert [[m["content"] for m in c["messages"]] for c in found] == [
            ["in private", "answered"],
            ["in a group"],
            ["by bob"],
        ]
        part = found[-1]["conversation"]
        assert (part["message_count"], part["summary"], part["scope_key"]) == (1, None, None)
        assert part["public_id"] != shelf.export(shared)["conversation"]["public_id"]


def test_a_tenants_export_holds_nothing_of_another(shelf, tmp_path):
    shelf.take(conversation("web:private:ann", "a"), tenant_id="acme")
    shelf.make("web:private:ann", "b")
    transfer.export_all(shelf.database, tmp_path / "acme.json", tenant_id="acme")
    (found,) = json.loads((tmp_path / "acme.json").read_text())
    assert found["conversation"]["tenant_id"] == "acme"


def test_hidden_conversations_are_not_exported(shelf, tmp_path):
    shelf.remove(shelf.make("web:private:ann", "a"))
    assert transfer.export_all(shelf.database, tmp_path / "x.json").conversations == 0


@about_files
def test_markdown_is_for_reading(shelf, tmp_path):
    shelf.make("web:private:ann", "# no heading\nof ours", "hi", title="A\ntitle")
    transfer.export_all(shelf.database, tmp_path / "x.md", "md")
    written = (tmp_path / "x.md").read_text()
    assert written.startswith("# A title\n")
    assert "> # no heading\n> of ours\n" in written
    assert "**2025-06-18T12:00:00Z · user · web:private:ann**" in written
    with pytest.raises(InvalidImport, match="Markdown can only be exported"):
        transfer.import_all(shelf.database, tmp_path / "x.md")


@about_files
def test_an_unknown_format_is_refused_before_anything_is_written(shelf, tmp_path):
    with pytest.raises(ValueError, match="json, jsonl, csv, md"):
        transfer.export_all(shelf.database, tmp_path / "x", "xml")
    assert list(tmp_path.iterdir()) == []


@about_files
def test_the_format_is_seen_where_the_name_does_not_say_it(shelf, other, tmp_path):
    some_conversations(shelf)
    for n, kind in enumerate(KINDS):
        file = tmp_path / f"all.{kind}"
        transfer.export_all(shelf.database, file, kind)
        plain = file.rename(tmp_path / f"plain{n}")
        found = transfer.import_all(other.database, plain)
        assert found.conversations + found.known == 3


@about_files
def test_progress_is_told_up_to_the_whole(shelf, other, tmp_path):
    shelf.make("web:private:ann", *["x"] * (2 * exports.PAGE + 3))
    told = []
    file = tmp_path / "all.jsonl"
    transfer.export_all(shelf.database, file, "jsonl", progress=lambda *step: told.append(step))
    total = 2 * exports.PAGE + 3
    assert told == [(0, total), (exports.PAGE, total), (2 * exports.PAGE, total)]
    read = []
    transfer.import_all(other.database, file, progress=lambda *step: read.append(step))
    assert read[-1] == (file.stat().st_size, file.stat().st_size)


# ------------------------------------------------------------------------------------------------- spreadsheets

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "＋1", "－1", "＠x",
            " =1", "\u3000 +1", "\xa0@x"]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_cell_begins_like_a_formula(formula):
    out = io.StringIO(newline="")
    writer = CsvWriter(out)
    head = {"user_key": formula, "platform": formula, "title": formula, "summary": formula, "traits": {}}
    writer.begin(head)
    writer.message({"role": "user", "content": formula, "sender_id": formula, "metadata": {formula: 1}})
    writer.end()
    cells = [cell for row in csv.reader(io.StringIO(out.getvalue(), newline="")) for cell in row]
    assert sum(formula in cell for cell in cells) >= 6
    assert not [
        cell for cell in cells if cell[:1] in set("\t\r\n") or cell.lstrip()[:1] in set("=+-@＝＋－＠")
    ]


@given(st.none() | st.text("=+-@'\r\n\t \u3000a", max_size=6) | st.text(max_size=6))
def test_a_cell_gives_back_what_was_put_into_it(value):
    assert from_cell(to_cell(value)) == value


def test_an_apostrophe_that_somebody_typed_stays():
    assert from_cell("'tis") == "'tis"


@about_files
def test_a_spreadsheet_sees_unicode_and_every_cell_in_quotes(shelf, tmp_path):
    shelf.make("web:private:ann", "天气")
    transfer.export_all(shelf.database, tmp_path / "x.csv", "csv")
    written = (tmp_path / "x.csv").read_bytes()
    assert written.startswith(b'\xef\xbb\xbf"record","id"')
    assert '"天气"'.encode() in written


# ------------------------------------------------------------------------------------------------ damaged input


def refused(shelf, tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidImport) as error:
        transfer.import_all(shelf.database, file)
    assert shelf.everything() == []
    return str(error.value)


OPEN = '{"conversation": {"user_key": "a", "platform": "web"},\n"messages": ['


@about_files
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "line 1: expected {, found the end of the file"),
        ("nonsense", "line 1: expected {, found 'n'"),
        ("[1]", "line 1: expected {, found '1'"),
        ("{}", 'line 1: no "conversation" in this object'),
        ('{"conversation": {"user_key": "a", "platform": "b"}}', 'line 1: no "messages" in this object'),
        (OPEN, "line 2: the file ends in the middle"),
        (OPEN + '\n{"role": "user", "content": "x"}', "line 3: expected , or ], found the end of the file"),
        (OPEN + '\n{"role": "user",\n"content" "x"}]}', "line 4: Expecting ':' delimiter (column 11)"),
        (OPEN + "]", "line 2: expected , or }, found the end of the file"),
        (OPEN + '], "x" 1}', "line 2: expected :, found '1'"),
        (OPEN + '\n{"role": "king", "content": "x"}]}', "line 3: role must be one of user, assistant"),
        (OPEN + '\n{"role": "user"}]}', "line 3: content must be a text, not NoneType"),
        (OPEN + '\n{"role": "user", "content": "a\\u0000b"}]}', "line 3: content holds a NUL"),
        (OPEN + '\n{"role": "user", "content": "\\ud800"}]}', "line 3: content holds a lone surrogate"),
        (OPEN + '\n{"role": "user", "content": "x", "tokens": -1}]}', "line 3: tokens must lie between"),
        (OPEN + '\n{"role": "user", "content": "x", "tokens": NaN}]}', "line 3: NaN is no JSON"),
        (OPEN + '\n{"role": "user", "content": "x", "tokens": true}]}', "line 3: tokens must be a whole number"),
        (OPEN + '\n{"role": "user", "content": "x", "timestamp": "soon"}]}', "line 3: timestamp must be an instant"),
        (OPEN + '\n{"role": "user", "content": "x", "metadata": []}]}', "line 3: metadata must be an object"),
        (OPEN + '\n"x"]}', "line 3: the message is no object"),
        ('{"conversation": {"platform": "web"}, "messages": []}', "line 1: user_key must be a text"),
        (
            '{"conversation": {"user_key": "' + "x" * 256 + '", "platform": "web"}, "messages": []}',
            "line 1: user_key must have 1 to 255 characters",
        ),
        (
            '{"conversation": {"user_key": "a", "platform": "web", "created_at": 5}, "messages": []}',
            "line 1: created_at must be a text",
        ),
        ('{"conversation": "x", "messages": []}', "line 1: the conversation is no object"),
        ("[" * 100_000, "line 1: expected {"),
        (OPEN + "[" * 100_000, "line 2: maximum recursion depth"),
    ],
)  # fmt: skip
def test_damaged_json_is_refused_with_line_and_reason(shelf, tmp_path, content, reason):
    assert refused(shelf, tmp_path, "x.json", content).startswith("x.json: " + reason)


@about_files
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.json", b'[\n{"conversation": "\xff"}]', "line 2: this is no UTF-8 text"),
        ("x.jsonl", b'\n{"conversation": "\xff"}', "line 2: this is no UTF-8 text"),
        ("x.csv", b'"record"\xff', "line 1: this is no UTF-8 text"),
        ("x.jsonl", '{"message": {}}', "line 1: message before any conversation"),
        ("x.jsonl", '{"conversation": 1', "line 1: Expecting ',' delimiter"),
        ("x.jsonl", '{"a": 1}', "line 1: unknown record 'a'"),
        ("x.jsonl", "[]", "line 1: expected"),
        ("x.csv", "a,b\r\n", "line 1: no column record, user_key"),
        (
            "x.csv",
            "record,user_key,platform,role,content\r\nx,,,,\r\n",
            "line 2: the column record holds 'x'",
        ),
        (
            "x.csv",
            "record,user_key,platform,role,content\r\nconversation,a\r\n",
            "line 2: 2 cells instead of 5",
        ),
        (
            "x.csv",
            'record,user_key,platform,role,content\r\nconversation,a,web,,\r\nmessage,,,user,"x',
            "line 3: unexpected end of data",
        ),
    ],
)
def test_damaged_lines_are_refused_with_line_and_reason(shelf, tmp_path, name, content, reason):
    assert refused(shelf, tmp_path, name, content).startswith(f"{name}: {reason}")


@about_files
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_off_anywhere_is_refused_or_complete(shelf, other, tmp_path, kind):
    shelf.make("web:private:ann", "one\nand two", "three")
    whole = tmp_path / f"whole.{kind}"
    transfer.export_all(shelf.database, whole, kind)
    content = whole.read_bytes()
    step = max(1, len(content) // 60)
    for length in range(0, len(content), step):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(content[:length])
        try:
            found = transfer.import_all(other.database, cut)
        except InvalidImport:
            assert other.everything() == [] or other.everything() == shelf.everything()
        else:
            assert found.conversations + found.known == 0 or other.everything() == shelf.everything()


@about_files
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_message_that_is_missing_or_too_many_is_noticed(shelf, other, tmp_path, kind):
    shelf.make("web:private:ann", "one", "two", "three")
    file = tmp_path / f"x.{kind}"
    transfer.export_all(shelf.database, file, kind)
    lines = [line for line in file.read_text().splitlines(keepends=True) if "two" not in line]
    assert "3 messages announced, 2 found" in refused(other, tmp_path, f"y.{kind}", "".join(lines))


def test_a_conversation_before_the_damage_is_stored_and_one_behind_it_is_not(shelf, tmp_path):
    good = json.dumps(conversation("a", "fine"))
    bad = json.dumps(conversation("b", "\0"))
    file = tmp_path / "x.json"
    file.write_text(f"[{good},\n{bad},\n{good}]")
    with pytest.raises(InvalidImport, match=r"line 2: .*1 conversations before it were imported"):
        transfer.import_all(shelf.database, file)
    assert [e["conversation"]["user_key"] for e in shelf.everything()] == ["a"]


@about_files
def test_text_behind_the_end_is_told(shelf, tmp_path):
    (tmp_path / "x.json").write_text(OPEN + "]} extra")
    with pytest.raises(InvalidImport, match="line 2: text behind the end"):
        transfer.import_all(shelf.database, tmp_path / "x.json")


@about_files
def test_members_in_another_order_and_members_of_others_are_fine(shelf, tmp_path):
    data = conversation("a", "hello")
    data = {
        "version": [1, {"x": 2}],
        "messages": data["messages"],
        "conversation": data["conversation"],
        "z": None,
    }
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(data, indent=3))
    assert transfer.import_all(shelf.database, tmp_path / "x.json") == transfer.Imported(1, 1, 0)


@about_files
@pytest.mark.parametrize("data", [None, [], {}, {"conversation": {}}, {"conversation": {}, "messages": {}}])
def test_data_of_another_shape_is_refused(shelf, data):
    with pytest.raises(InvalidImport):
        shelf.take(data)


@about_files
def test_a_wrong_message_is_named_by_its_place_in_the_data(shelf):
    data = conversation("a", "x", "y")
    data["messages"][1]["role"] = "nobody"
    with pytest.raises(InvalidImport, match=r"^messages\[1\]: role"):
        shelf.take(data)
    data = conversation("a", "x", "y")
    for message in data["messages"]:
        message["save_key"] = "k"
    with pytest.raises(InvalidImport, match="two messages have the save_key 'k'"):
        shelf.take(data)


# -------------------------------------------------------------------------------------------- long conversations


def long_file(path, messages, *, damaged=False):
    with path.open("w") as file:
        file.write('{"conversation": {"user_key": "web:private:ann", "platform": "web"}}\n')
        for n in range(messages):
            role = "nobody" if damaged and n == messages - 1 else "user"
            file.write(json.dumps({"message": {"role": role, "content": f"天气 {n}"}}) + "\n")
        file.write(f'{{"end": {messages}}}\n')


def test_a_long_conversation_comes_in_pieces_and_is_there_as_a_whole(shelf, tmp_path):
    many = 2 * exports.PAGE + 1
    long_file(tmp_path / "x.jsonl", many)
    seen = []
    transfer.import_all(
        shelf.database, tmp_path / "x.jsonl", progress=lambda *_: seen.append(len(shelf.everything()))
    )
    assert set(seen) == {0}
    (found,) = shelf.everything()
    assert [m["content"] for m in found["messages"]] == [f"天气 {n}" for n in range(many)]
    assert found["conversation"]["message_count"] == many
    assert len(shelf.find("天气")) == many
    assert transfer.import_all(shelf.database, tmp_path / "x.jsonl").known == 1


def test_nothing_of_a_long_conversation_stays_when_its_last_message_is_damaged(shelf, tmp_path):
    long_file(tmp_path / "x.jsonl", 2 * exports.PAGE + 1, damaged=True)
    with pytest.raises(InvalidImport, match=f"line {2 * exports.PAGE + 2}: role"):
        transfer.import_all(shelf.database, tmp_path / "x.jsonl")
    assert shelf.everything() == []
    assert shelf.find("天气") == []
    while shelf.database.write(cleanup.remove_hidden):
        pass
    left = shelf.database.read(
        lambda tx: tx.connection.execute(text("SELECT count(*) FROM conversations")).scalar_one()
    )
    assert left == 0


def test_a_cleanup_leaves_an_import_alone_that_is_not_ready(shelf):
    row = {
        "public_id": "staged",
        "user_key": "a",
        "platform": "web",
        "created_at": NOON,
        "last_activity": NOON,
        "hidden_at": NOON + timedelta(hours=3),
    }
    shelf.database.write(lambda tx: tx.connection.execute(insert(conversation_table), row))
    assert shelf.database.write(cleanup.remove_hidden) == 0


@about_files
def test_an_export_and_an_import_hold_only_a_little_at_a_time(shelf, tmp_path):
    file = tmp_path / "x.jsonl"
    with file.open("w") as out:
        out.write('{"conversation": {"user_key": "web:private:ann", "platform": "web"}}\n')
        for _ in range(4000):
            out.write(json.dumps({"message": {"role": "user", "content": "x" * 4000}}) + "\n")
        out.write('{"end": 4000}\n')
    transfer.import_all(shelf.database, file)  # imports and caches are there afterwards
    shelf.remove(1)
    tracemalloc.start()
    transfer.import_all(shelf.database, file)
    for kind in KINDS:
        transfer.export_all(shelf.database, tmp_path / f"y.{kind}", kind)
        for incoming in read_file(Path(tmp_path / f"y.{kind}")):
            assert sum(1 for _ in incoming.messages) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000  # of 16 MB of text
