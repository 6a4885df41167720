//! How messages are called in traces.

use tidemill_kvtransfer_proto::message::Message;

/// A message in a word or two.
pub(super) fn short(message: &Message) -> String {
    match message {
        Message::Hello(_) => "hello".to_owned(),
        Message::Welcome(_) => "welcome".to_owned(),
        Message::Refuse(refuse) => format!("refuse: {}", refuse.reason),
        Message::Attach(_) => "attach".to_owned(),
        Message::Ready(ready) => format!("ready, busy with {:?}", ready.busy),
        Message::Reserve(reserve) => {
            let blocks: Vec<u32> = reserve.targets.iter().map(|it| it.block.0).collect();
            format!("reserve {} blocks {blocks:?}", reserve.handoff)
        }
        Message::Decline { handoff, reason } => format!("decline {handoff}: {reason}"),
        Message::Filled(filled) => {
            let (first, count) = (filled.first, filled.targets.len());
            format!("filled {}: {count} blocks after {first}", filled.handoff)
        }
        Message::Commit(commit) => {
            let (first, count) = (commit.first, commit.targets.len());
            format!("commit {}: {count} blocks after {first}", commit.handoff)
        }
        Message::Adopted { handoff } => format!("adopted {handoff}"),
        Message::Refused { handoff, reason } => format!("refused {handoff}: {reason}"),
        Message::Cancel { handoff } => format!("cancel {handoff}"),
        Message::Quiet { handoff, reason } => format!("quiet {handoff}: {reason}"),
        Message::Heartbeat { seq } => format!("heartbeat {seq}"),
        Message::Paths(paths) => format!("{} paths", paths.ends.len()),
        Message::PathDown { path } => format!("path {path} is down"),
        Message::PathAnew { path, .. } => format!("path {path} anew"),
        Message::PathUp { path } => format!("path {path} is up"),
        Message::Ask { handoff, ask } => format!("ask {handoff}: {} of {} B", ask.ended, ask.wanted),
        Message::Grant { handoff, bytes } => format!("grant {handoff} {bytes} B"),
        Message::Offer(offered) => {
            let (before, count) = (offered.before, offered.pieces.len());
            format!("offer {}: {count} pieces after {before}", offered.handoff)
        }
        Message::Fetched { handoff, pieces } => format!("fetched {handoff}: {pieces} pieces"),
        Message::Bye { busy } => format!("bye, busy with {busy:?}"),
    }
}
