//! What a supervised worker tells its parent: one JSON object per line on stdout.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// Something takes a while.
    Progress {
        /// What is going on.
        stage: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The worker serves.
    Ready {
        /// Where routers reach it.
        address: SocketAddr,
    },
}

impl Report {
    /// Writes the line. A parent that no longer reads is about to end this process anyway.
    #[expect(clippy::print_stdout, reason = "stdout is the way to the parent")]
    pub(crate) fn print(&self) {
        println!("{}", serde_json::to_string(self).expect("numbers and text are always JSON"));
    }
}
