"""TLS stacks that nobody here wrote, in both roles: whole programs (``stacks``), and tlslite-ng under control record by record."""
