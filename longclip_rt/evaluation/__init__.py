"""Does a model still retrieve and classify: data sets in their own layouts, the paper's tables, models side by side."""
