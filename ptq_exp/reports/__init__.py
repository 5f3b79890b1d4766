"""Many runs or one, to look at: tables, figures, HTML."""
