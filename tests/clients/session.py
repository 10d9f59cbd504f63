"""A session of qemu.qmp's asyncio client with the monitor at argv[1]: prints what came of each step, one line each."""

import asyncio
import os
import sys

from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError


async def main() -> None:
    client = QMPClient("test")
    await client.connect(sys.argv[1])
    print("greeting", client.greeting.QMP.version["qemu"]["major"] >= 0)
    print("status", (await client.execute("query-status"))["status"])
    with client.listener(("STOP", "RESUME")) as events:
        await client.execute("stop")
        print("event", (await events.get())["event"])
        print("status", (await client.execute("query-status"))["status"])
        await client.execute("cont")
        print("event", (await events.get())["event"])
    try:
        await client.execute("no-such-command", {"a": 1})
    except ExecuteError as error:
        print("error", error.error_class, error)
    # Many at once: replies find their way by id.
    names = await asyncio.gather(*(client.execute("query-name") for _ in range(100)))
    print("names", {name["name"] for name in names})
    with open(os.devnull, "rb") as null:
        client.send_fd_scm(null.fileno())
        await client.execute("getfd", {"fdname": "null"})
    await client.execute("closefd", {"fdname": "null"})
    print("fd ok")
    await client.disconnect()
    print("end")


asyncio.run(main())
