"""The parts of scripts/train_demo.py: corpus, baselines, model, step, loop, and what it writes at the end."""
