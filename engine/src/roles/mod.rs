//! The two sides of a handoff, as the engine sees them.

pub(crate) mod decode;
mod events;
mod first_token;
pub(crate) mod links;
pub(crate) mod prefill;
mod staging;

pub(crate) use first_token::FirstToken;
