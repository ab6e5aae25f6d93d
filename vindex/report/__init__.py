"""A vindex as one page that needs nothing else: `vindex report`, `vindex.write_report`."""
