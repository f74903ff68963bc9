//! Failpoints for this crate's tests: at each, a step fails or the daemon stops as by SIGKILL. They
//! are before and after every write of the journal, every effect on the host and its undo, and
//! every call of a guest or a VMM. Other builds have none: the type is empty and the checks do
//! nothing.

use std::fmt;
use std::io;
#[cfg(test)]
use std::sync::Arc;

use crate::error::Error;

/// `After`: the step is done and its result is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum When {
    Before,
    After,
}

#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Continue,
    Fail,
    /// The daemon stops here.
    Crash,
}

/// Decides the action each time a failpoint is reached.
#[cfg(test)]
pub(crate) trait Hook: Send + Sync {
    fn reached(&self, when: When, what: &str) -> Action;
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
    /// Blocks.
    #[inline]
    pub(crate) fn check_blocking(&self, _: When, _: &str) -> io::Result<()> {
        Ok(())
    }

    #[inline]
    pub(crate) async fn check(&self, _: When, _: &str) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
impl Failpoints {
    pub(crate) fn new(hook: Arc<dyn Hook>) -> Self {
        Self { hook: Some(hook) }
    }

    fn action(&self, when: When, what: &str) -> Action {
        self.hook.as_ref().map_or(Action::Continue, |hook| hook.reached(when, what))
    }

    pub(crate) fn check_blocking(&self, when: When, what: &str) -> io::Result<()> {
        match self.action(when, what) {
            Action::Continue => Ok(()),
            // As on a full disk.
            Action::Fail => Err(io::ErrorKind::StorageFull.into()),
            // Without panic hook and message, as after SIGKILL.
            Action::Crash => std::panic::resume_unwind(Box::new("crash")),
        }
    }

    pub(crate) async fn check(&self, when: When, what: &str) -> Result<(), Error> {
        match self.action(when, what) {
            Action::Continue => Ok(()),
            Action::Fail => Err(Error::unavailable(format!("failpoint: {what}"))),
            Action::Crash => std::future::pending().await,
        }
    }
}

impl Failpoints {
    /// Runs a step with a failpoint before it and one after its success.
    pub(crate) async fn wrap<T>(
        &self,
        what: &str,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.check(When::Before, what).await?;
        let done = step.await?;
        self.check(When::After, what).await?;
        Ok(done)
    }

    /// [`Self::wrap`] for a blocking step.
    pub(crate) fn wrap_blocking<T>(
        &self,
        what: &str,
        step: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let check = |when| self.check_blocking(when, what).map_err(|e| Error::io(what, e));
        check(When::Before)?;
        let done = step()?;
        check(When::After)?;
        Ok(done)
    }
}
