"""The command line behind the Makefile, the submitit launchers, and what they launch.
Login-node modules here import no torch; each stage imports its compute package inside its call."""
