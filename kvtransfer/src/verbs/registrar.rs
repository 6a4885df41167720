//! One thread for what takes long: pinning an arena for a peer, and taking that back.
//!
//! Both walk all pages of the arena, which for a large one is longer than the endpoint's thread may be away from its
//! heartbeats.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use tidemill_kvtransfer_proto::endpoint_core::LinkId;
use tidemill_kvtransfer_proto::path::PathEnd;

use super::device::Fabric;
use super::error::VerbsError;
use super::setup::{Draft, Tuning};
use super::transport::Access;

/// Orders to that thread, which ends when this is dropped and everything ordered is done.
#[derive(Debug)]
pub(crate) struct Registrar {
    jobs: Sender<Job>,
    revoked: Receiver<(u64, LinkId)>,
}

/// A draft in the making.
pub(crate) type Drafting = Receiver<Result<Draft, VerbsError>>;

#[derive(Debug)]
enum Job {
    Draft { local: Option<IpAddr>, theirs: Option<Vec<PathEnd>>, reply: Sender<Result<Draft, VerbsError>> },
    Revoke { peer: u64, link: LinkId, access: Access },
}

impl Registrar {
    /// Starts the thread. It writes to `wake` after each job.
    pub(crate) fn start(fabric: Fabric, wake: Arc<OwnedFd>) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (done, revoked) = mpsc::channel();
        thread::Builder::new().name("kv-registrar".to_owned()).spawn(move || {
            for job in inbox {
                match job {
                    // Who does not wait any more does not need to know.
                    Job::Draft { local, theirs, reply } => {
                        let draft = Draft::new(&fabric, local, theirs.as_deref(), Tuning::default());
                        let _ = reply.send(draft);
                    }
                    Job::Revoke { peer, link, access } => {
                        drop(access);
                        let _ = done.send((peer, link));
                    }
                }
                // Fails only when the counter would overflow, and then the thread is awake anyway.
                let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
            }
        })?;
        Ok(Self { jobs, revoked })
    }

    /// Makes this side's ends of paths; see [`Draft::new`].
    pub(crate) fn draft(&self, local: Option<IpAddr>, theirs: Option<Vec<PathEnd>>) -> Drafting {
        let (reply, drafting) = mpsc::channel();
        self.order(Job::Draft { local, theirs, reply });
        drafting
    }

    /// Takes a peer's rights away; [`revoked`](Self::revoked) says when they are gone.
    pub(crate) fn revoke(&self, peer: u64, link: LinkId, access: Access) {
        self.order(Job::Revoke { peer, link, access });
    }

    /// Links whose peers have lost their rights since the last call.
    pub(crate) fn revoked(&self) -> Vec<(u64, LinkId)> {
        self.revoked.try_iter().collect()
    }

    fn order(&self, job: Job) {
        // The thread only ends with this value, or by a panic, which it reports itself; then no draft comes and
        // nothing is ever proven quiet, which is what must happen.
        if self.jobs.send(job).is_err() {
            tracing::error!("the thread that registers memory is gone");
        }
    }
}
