"""The page that `python -m ddt_fast.demo` serves: models → requests → drawing → page."""
