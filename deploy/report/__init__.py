"""The privacy-budget report: sources -> evidence -> figures -> report.json -> one self-contained page."""
