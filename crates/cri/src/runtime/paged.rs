//! Lists in several messages.

use std::pin::Pin;

use futures_util::Stream;
use tonic::Status;

pub(crate) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items a message of a streamed list; a thousand pods fit well into the message limit.
const PAGE: usize = 500;

/// A list in pages, for the streaming verbs.
pub(crate) fn paged<I, M>(items: Vec<I>, message: fn(Vec<I>) -> M) -> Streamed<M>
where
    I: Send + 'static,
    M: Send + 'static,
{
    let mut items = items.into_iter();
    let pages = std::iter::from_fn(move || {
        let page: Vec<I> = items.by_ref().take(PAGE).collect();
        (!page.is_empty()).then(|| Ok(message(page)))
    });
    Box::pin(tokio_stream::iter(pages))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_long_list_is_streamed_in_pages() {
        let items: Vec<usize> = (0..PAGE + 1).collect();
        let pages: Vec<usize> = paged(items, |page| page.len()).map(Result::unwrap).collect().await;
        assert_eq!(pages, [PAGE, 1]);
        assert_eq!(paged(Vec::<usize>::new(), |page| page.len()).count().await, 0);
    }
}
