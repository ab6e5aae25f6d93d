"""The families of vindexes that open: ours, and what others published; a module each."""
