"""PostgreSQL, which remembers jobs and steps, and the files that they make."""
