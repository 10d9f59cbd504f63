"""The disk argv[2] of the monitor argv[1] moves to a new image argv[3] and back, by qemu.qmp's asyncio client: prints
what came of each step, one line each."""

import asyncio
import sys

from qemu.qmp import EventListener, QMPClient

JOBS = ("JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")


async def main() -> None:
    monitor, device, target = sys.argv[1:]
    client = QMPClient("pivot")
    await client.connect(monitor)

    async def disk() -> dict:
        found = [disk for disk in await client.execute("query-block") if disk["device"] == device]
        return found[0]["inserted"]

    async def until(events: EventListener, name: str, **data: str) -> dict:
        while True:
            event = await asyncio.wait_for(events.get(), 60)
            if event["event"] == name and data.items() <= event["data"].items():
                return event["data"]

    size = (await disk())["image"]["virtual-size"]
    with client.listener(JOBS) as events:
        options = {"driver": "file", "filename": target, "size": size}
        await client.execute("blockdev-create", {"job-id": "create", "options": options})
        await until(events, "JOB_STATUS_CHANGE", id="create", status="concluded")
        assert "error" not in (await client.execute("query-jobs"))[0]
        await client.execute("job-dismiss", {"id": "create"})
        print("created")

        async def move(node: str, filename: str) -> None:
            file = {"driver": "file", "filename": filename}
            await client.execute("blockdev-add", {"driver": "raw", "node-name": node, "file": file})
            mirror = {"job-id": "move", "device": device, "target": node, "sync": "full", "auto-dismiss": False}
            await client.execute("blockdev-mirror", mirror)
            ready = await until(events, "BLOCK_JOB_READY", device="move")
            print("ready", ready["offset"], ready["len"])
            await client.execute("job-complete", {"id": "move"})
            completed = await until(events, "BLOCK_JOB_COMPLETED", device="move")
            print("completed", *[completed["error"]] if "error" in completed else [])
            await until(events, "JOB_STATUS_CHANGE", id="move", status="concluded")
            print("file", (await disk())["file"])
            await client.execute("job-dismiss", {"id": "move"})

        source = (await disk())["file"]
        await move("copy", target)
        await move("back", source)
        await client.execute("blockdev-del", {"node-name": "copy"})
        print("deleted")

    print("jobs", await client.execute("query-block-jobs"))
    await client.disconnect()


asyncio.run(main())
