//! Sends each request to the workers that serve it best, and keeps it alive when they do not.

mod journey;
