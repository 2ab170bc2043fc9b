"""xloom's Grafana boards and Prometheus alerts, as code."""
