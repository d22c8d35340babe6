"""`be-serve train --plan`: what a run would do, the pace of this machine, and the time and memory from both."""
