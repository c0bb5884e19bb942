"""The ranks of OpenAI's encodings, packed; NOTICE.txt says whose they are and how they are packed."""
