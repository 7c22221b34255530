"""Speed, each figure beside a peer or a floor measured in the same run. See
benchmarks/README.md."""
