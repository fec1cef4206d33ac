"""What the benchmark scripts share: shapes and routings, who takes part, how they are timed, how results are shown."""
