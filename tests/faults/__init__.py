"""Disks that misbehave: every operation of every writing verb fails once, or is lost with power.

    python -m tests.faults --all              all operations x all kinds of faults, and power loss
    python -m tests.faults --all --peers      the same of dcp.save, torch.save and save_file
    python -m tests.faults --only "save over" one verb; -v lists what was found

shim.c fails, kills at and records the operations; `verbs` says what is written and how it is read
back; `walk` counts through the operations; `power` replays what was recorded.
"""
