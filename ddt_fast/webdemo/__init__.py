"""What `python -m ddt_fast.demo` shows: models and requests, what is drawn from them, and the page around it."""
