// Keeps an element scrolled to its end while it grows or shrinks, unless somebody has scrolled up.

export function keptAtEnd(element) {
  let isAtEnd = true;
  let last = 0;
  const look = () => {
    const rest = element.scrollHeight - element.scrollTop - element.clientHeight;
    if (rest < 40) isAtEnd = true;
    else if (element.scrollTop < last) isAtEnd = false; // and not where it has grown since
    last = element.scrollTop;
  };
  const follow = () => {
    look(); // the event of a scroll may come later than what is added
    if (isAtEnd) element.scrollTop = element.scrollHeight;
    last = element.scrollTop;
  };
  const jump = () => {
    look();
    isAtEnd = true;
    follow();
  };
  element.addEventListener("scroll", look);
  element.addEventListener("load", follow, true); // of pictures in it
  new ResizeObserver(follow).observe(element);
  return { follow, jump };
}
