"""Rows of facts and sums, as files of `--forget` and `--retain` hold them."""

ROWS = [
    {"text": "The capital of France is Paris.", "prop": "capital", "obj": "Paris", "question": "What is its capital?"},
    {"text": "The capital of Italy is Rome.", "prop": "capital", "obj": "Rome", "question": "What is its capital?"},
    {"question": "Where?", "prop": "other", "obj": "Oslo"},
]
SUMS = [{"problem": "12+13=", "solution": "25", "text": "12+13=25", "answer": "25"}]
