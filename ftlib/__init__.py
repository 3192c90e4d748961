"""The library behind the jobs: what a run is, how it is planned, trained, exported and judged.
Modules at this level are the ground: plain files, no torch. `ftlib` never imports `jobs`."""
