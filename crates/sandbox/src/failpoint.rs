//! Places at which this crate's tests make a step fail, or end the daemon as SIGKILL would: around
//! every write of the journal, every side effect on the host and its undoing, and every call of a
//! guest or a VMM. Other builds have none: there the type is empty and passing does nothing.

use std::fmt;
use std::io;
#[cfg(test)]
use std::sync::Arc;

use crate::error::Error;

/// After: the step is done, and what it has answered is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum When {
    Before,
    After,
}

#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Fail,
    /// Nothing of the daemon goes on from here.
    Crash,
}

/// Decides what happens at a place, each time that the place is reached.
#[cfg(test)]
pub(crate) trait Hook: Send + Sync {
    fn reached(&self, when: When, what: &str) -> Verdict;
}

#[derive(Clone, Default)]
pub(crate) struct Failpoints {
    #[cfg(test)]
    hook: Option<Arc<dyn Hook>>,
}

impl fmt::Debug for Failpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failpoints").finish_non_exhaustive()
    }
}

#[cfg(not(test))]
impl Failpoints {
    /// For threads that may block.
    #[inline]
    pub(crate) fn pass(&self, _: When, _: &str) -> io::Result<()> {
        Ok(())
    }

    #[inline]
    pub(crate) async fn reach(&self, _: When, _: &str) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
impl Failpoints {
    pub(crate) fn new(hook: Arc<dyn Hook>) -> Self {
        Self { hook: Some(hook) }
    }

    fn verdict(&self, when: When, what: &str) -> Verdict {
        self.hook.as_ref().map_or(Verdict::Pass, |hook| hook.reached(when, what))
    }

    pub(crate) fn pass(&self, when: When, what: &str) -> io::Result<()> {
        match self.verdict(when, what) {
            Verdict::Pass => Ok(()),
            // As of a full disk.
            Verdict::Fail => Err(io::ErrorKind::StorageFull.into()),
            // No hook, no message: the thread is gone, as after SIGKILL.
            Verdict::Crash => std::panic::resume_unwind(Box::new("crash")),
        }
    }

    pub(crate) async fn reach(&self, when: When, what: &str) -> Result<(), Error> {
        match self.verdict(when, what) {
            Verdict::Pass => Ok(()),
            Verdict::Fail => Err(Error::unavailable(format!("failpoint: {what}"))),
            Verdict::Crash => std::future::pending().await,
        }
    }
}

impl Failpoints {
    /// A step with a place before it and one after its success.
    pub(crate) async fn around<T>(
        &self,
        what: &str,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.reach(When::Before, what).await?;
        let done = step.await?;
        self.reach(When::After, what).await?;
        Ok(done)
    }

    /// The same of a step that blocks.
    pub(crate) fn around_blocking<T>(
        &self,
        what: &str,
        step: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let reached = |when| self.pass(when, what).map_err(|e| Error::io(what, e));
        reached(When::Before)?;
        let done = step()?;
        reached(When::After)?;
        Ok(done)
    }
}
