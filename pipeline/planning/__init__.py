"""What a run will need before it is started: operations, memory, communication, time; closed forms, docs/plan.md."""
