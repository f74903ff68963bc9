"""Writes rows to a shared SQLite database in WAL mode: `DB NAME COUNT`, or `DB check`."""

import sqlite3
import sys

base = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
mode = base.execute("pragma journal_mode=wal").fetchone()[0]
assert mode == "wal", mode
base.execute("pragma synchronous=normal")
base.execute("create table if not exists rows (name text, n integer, filler blob)")
base.execute("create index if not exists names on rows (name, n)")
if sys.argv[2] == "check":
    print(base.execute("pragma integrity_check").fetchone()[0])
    for name, count, last in base.execute("select name, count(*), max(n) from rows group by name"):
        print(name, count, last)
else:
    for n in range(int(sys.argv[3])):
        base.execute("begin immediate")
        base.execute("insert into rows values (?, ?, zeroblob(700))", (sys.argv[2], n))
        base.execute("commit")
        print(sys.argv[2], n, flush=True)
