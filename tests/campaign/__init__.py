"""A seeded campaign of damaged and hostile inputs against every command: `python -m tests.campaign --help`.

damage   ways to spoil bytes, JSON, headers and places
bases    the sound things that are spoiled
others   vindexes as others publish them, spoiled
commands what a case is, and commands that only vary the words
hostile  templates and pickles that do harm, and a system that fails
cases    one category of cases each: (category, seed) → files, and the commands that meet them
judge    runs a command in a process of its own and says whether it kept its promises
"""
