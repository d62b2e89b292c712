"""What the files of a run are called in its output folder, beside the adapter's and its states. Imports nothing."""

PAGE = "report.html"  # the page, which is live
METRICS = "metrics.json"  # final figures
ROWS = "metrics.csv"  # numbers by step
CONFIG = "config.toml"  # every option as it was used
ACCOUNT = "account.json"  # what the data held
SAMPLES = "samples"  # the folder of pictures
README = "README.md"  # the card
