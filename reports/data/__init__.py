"""What a report knows: runs, studies, paired differences."""
