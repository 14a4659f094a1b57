"""What the processes of a comparison run: ``python -m moe_prefill.bench.sides.NAME JOB CELLS``."""
