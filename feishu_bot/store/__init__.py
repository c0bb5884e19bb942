"""Everything SQL: one code for SQLite, PostgreSQL and MariaDB."""
