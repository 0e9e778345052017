"""SQLite files that several connections of several processes share."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from gose.state import open_database


def test_another_process_neither_misses_nor_hides_anything(tmp_path: Path) -> None:
    """Closing a second descriptor of the file would drop the locks of the first connection; the other process would then, on its end,
    take the write-ahead log away from under it."""
    path = tmp_path / "x.sqlite"
    with (
        contextlib.closing(open_database(path, "CREATE TABLE IF NOT EXISTS t (v)")) as first,
        contextlib.closing(open_database(path, "")) as second,
    ):
        first.execute("INSERT INTO t VALUES (1)")
        code = (
            "import sys; from pathlib import Path; from gose.state import open_database\n"
            "d = open_database(Path(sys.argv[1]), ''); d.execute('INSERT INTO t VALUES (2)'); d.close()"
        )
        for _ in range(2):
            subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        second.execute("INSERT INTO t VALUES (3)")
        assert [row[0] for row in first.execute("SELECT v FROM t ORDER BY rowid")] == [1, 2, 2, 3]
        assert (tmp_path / "x.sqlite-wal").exists()
    with contextlib.closing(open_database(path, "")) as again:
        assert again.execute("SELECT COUNT(*) FROM t").fetchone() == (4,)


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    with contextlib.closing(open_database(tmp_path / "new" / "x.sqlite", "CREATE TABLE t (v)")) as database:
        database.execute("INSERT INTO t VALUES (1)")
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o600}
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
