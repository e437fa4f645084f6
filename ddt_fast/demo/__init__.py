"""The page that `python -m ddt_fast.demo` serves: requests → drawing → page."""
