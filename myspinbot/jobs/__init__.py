"""What takes a job from step to step: in this process, in workers, in the conductor."""
