"""Writes records until it is killed: `records_writer.py FILE LIFE`, a line for each write that was answered.

Six writers at once: new keys, keys written again and again, removals, and one count that all of them raise.
"""

import asyncio
import sys
from pathlib import Path

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError
from metadata_server.records.base import PutOutcome
from metadata_server.records.sqlite import sqlite_records


async def main(path: Path, life: str) -> None:
    records = await sqlite_records(path, SystemClock())
    print("ready", flush=True)

    def answered(*words: object) -> None:
        sys.stdout.write(" ".join(map(str, words)) + "\n")
        sys.stdout.flush()

    async def write(writer: int) -> None:
        for step in range(1_000_000):
            key = f"new/{life}/{writer}/{step}"
            reply = await records.put(key, life.encode() * 20, expect=0)
            assert reply.outcome is PutOutcome.WRITTEN
            answered("put", key)
            await records.put(f"again/{writer}", f"{life}.{step}".encode())
            answered("again", writer, f"{life}.{step}")
            if step >= 5:
                gone = f"new/{life}/{writer}/{step - 5}"
                assert await records.delete(gone)
                answered("gone", gone)
            count = await records.get("count")
            value, at = (int(count.value), count.revision) if count else (0, 0)
            reply = await records.put("count", b"%d" % (value + 1), expect=at)
            if reply.outcome is PutOutcome.WRITTEN:
                answered("count", value + 1)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(records.run())
        for writer in range(6):
            tasks.create_task(write(writer))


if __name__ == "__main__":
    try:
        asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
    except ConfigError as error:
        sys.exit(f"refused: {error}")
