"""What every benchmark needs: timing, training loops, results as CSV."""
