"""Lightning callbacks: each does one thing and owns no weights."""
