"""What train.py needs beside the loop: settings, recipes, batches, checkpoints."""
