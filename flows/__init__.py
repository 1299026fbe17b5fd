"""The order of work: each flow reads like the runbook; SQL, HTTP and Docker live in `tasks`."""
