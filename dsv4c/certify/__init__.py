"""Evidence for rewrites: certificates, mistakes that they must notice, and how far results may be apart."""
