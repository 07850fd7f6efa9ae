"""A run, or several, as one HTML page. `read` and `model` hold the numbers, `page` draws them."""
