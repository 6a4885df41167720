//! The messages and services of `proto/worker.proto`, as generated. Only [`convert`](crate::convert),
//! [`worker`](crate::worker) and [`worker_link`](crate::worker_link) may use them.
#![allow(missing_docs, unreachable_pub, missing_debug_implementations, clippy::all, clippy::use_self)]

tonic::include_proto!("tidemill.worker.v1");
