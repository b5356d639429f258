"""What an enemy may hand over: archives, run folders, recipes. Each table is of attacks, and what
they aim at is looked at afterwards: it must be as it was.
"""
