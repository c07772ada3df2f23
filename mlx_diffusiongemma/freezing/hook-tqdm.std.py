"""Leave out of tqdm the data frames that it can show the progress of. A program that has any imports pandas itself."""

excludedimports = ["pandas"]
