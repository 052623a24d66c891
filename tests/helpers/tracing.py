"""Measures the peak memory of a call with the allocator's own counts."""

from __future__ import annotations

import json

from torch.profiler import ProfilerActivity, profile


def traced_peak(call, folder):
    """Returns the peak in bytes above the start of the call, as the CPU's allocator reports it to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event["name"] == "[memory]"]
    start = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - start
