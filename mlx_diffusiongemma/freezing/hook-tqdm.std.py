"""Leave out the data frames whose progress tqdm can show. A program that has any imports pandas itself."""

excludedimports = ["pandas"]
