"""What to run next: sequences, block pool, scheduler, step plan. No torch, no threads, no I/O."""
